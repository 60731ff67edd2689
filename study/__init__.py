"""The runs of Section 5: grid, verdicts, pages, pictures."""
