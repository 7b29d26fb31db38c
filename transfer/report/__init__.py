"""Results in, a report out: `evidence` collects, groups and compares; `pages` writes what a person reads."""
