"""What is on disk of a suite under way: each step's files and state, the suite's lock."""
