"""Backends turn descriptors into plans; `e3nn_accel.plan.Backend` says what one must offer."""
