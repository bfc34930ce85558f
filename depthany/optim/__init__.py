"""Parameter groups and schedules on samples seen."""
