"""Running local modules: forward, loss, backward and update of one after another."""
