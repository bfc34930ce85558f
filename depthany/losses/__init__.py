"""One supervision term per file, and their weighted sum: one value per image, in float32."""
