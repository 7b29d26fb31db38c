"""What every command stands on: parsing, errors, progress, files, signals, process groups. No mathematics."""
