"""Objectives: functions of several views' embeddings, mostly of their covariance's spectrum; a diagnosis."""
