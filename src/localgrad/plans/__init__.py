"""From a recipe and a memory budget to a plan, and from a plan to a recipe; tables; replanning."""
