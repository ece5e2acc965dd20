"""Files in and out: names, arrays and metadata."""
