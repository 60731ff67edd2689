"""Scoring a model's rows; logs in and out; attacks."""
