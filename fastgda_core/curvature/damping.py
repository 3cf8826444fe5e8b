"""The default damping of a Fisher, in a module of its own so that a configuration can name it without torch."""

DAMPING = 0.1  # x the layer's mean eigenvalue: design section 4
