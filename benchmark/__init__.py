"""Opponents and measurements of speed and memory."""
