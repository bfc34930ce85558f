"""One file per kind of dataset; each source lists its samples and reads one as a contract of depthany.types."""
