"""Models as a stem, blocks and a tail: what a library's models need, and the proof that nothing is lost."""
