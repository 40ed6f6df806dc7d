"""One model line per file; the file name is the family name."""
