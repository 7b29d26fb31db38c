"""Objectives: functions of several views' embeddings, most of them of the spectrum of their covariance."""
