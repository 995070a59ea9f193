"""Bugs planted in copies of the library on purpose: the checker must find each, by the rule that it breaks.

parcels.py      the application that runs on a copy: parcels get labels, with numbers from 1 on
edits.py        a copy of the library with some of its text replaced
world.py        the copy's processes, and what clients record of them
situations.py   the load and the fault that bring a bug out; each holds on the library as it is
bugs.py         the bugs, where each shows, and by which rule
harmless.py     changes about which the checker must say nothing
"""
