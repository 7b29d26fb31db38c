"""What a suite runs: steps, their graph, the resources each asks for, the checks before they start."""
