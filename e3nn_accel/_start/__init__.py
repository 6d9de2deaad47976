"""The start files, and the one import waiter behind every way of enabling.

The wheel also puts the three files at the root of site-packages, the only place where Python
looks for them: `e3nn_accel.pth` (until Python 3.17), `e3nn_accel.start` (Python 3.15 and later) and
the module both of them name, `_e3nn_accel_boot`. They do nothing unless `E3NN_ACCEL` is set.
`e3nn-accel hook status|install|remove` shows, writes and deletes them.
"""
