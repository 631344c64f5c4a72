"""What in deploy/ and docs/ follows from the program, so that nobody has to keep it in step by hand."""
