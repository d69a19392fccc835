"""Which models of other libraries are split and train as local modules, and why others don't."""
