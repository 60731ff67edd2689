"""Presets, loading, log pi(answer), generation."""
