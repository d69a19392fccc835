"""Local modules in several processes: who does what, what travels, and how it ends."""
