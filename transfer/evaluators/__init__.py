"""One evaluator a module: k-NN, linear probe, logistic regression, SVM, semi-supervised fine-tuning."""
