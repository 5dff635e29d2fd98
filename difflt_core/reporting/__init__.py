"""Results in words, tables and figures: items with their provenance, claims, the page, the runner."""
