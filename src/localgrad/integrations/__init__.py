"""What fits localgrad into other libraries' own loops: a file each, behind the extra of that name."""
