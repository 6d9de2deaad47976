"""The intercepted classes, one small file each: what a module computes, and how its arguments become operands."""
