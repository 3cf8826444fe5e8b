"""How strongly a Fisher is damped unless told otherwise; apart from it, as a configuration names it without torch."""

DAMPING = 0.1  # x the layer's mean eigenvalue: design section 4
