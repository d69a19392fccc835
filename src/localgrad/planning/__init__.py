"""From a memory budget to a plan: costs, search and one step that confirms it."""
