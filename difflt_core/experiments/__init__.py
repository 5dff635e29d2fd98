"""The stages strung together, variants of them, and what is measured."""
