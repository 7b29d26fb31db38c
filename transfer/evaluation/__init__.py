"""What every evaluator shares: protocol, images, features, results."""
