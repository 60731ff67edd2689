"""Opponents and measurements of speed."""
