"""Recipes, what is built from them, and plans for them."""
