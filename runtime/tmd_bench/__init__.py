"""`tmd-bench`: how fast a bundle runs, stage by stage, and beside what a user would run instead.

Every contender has a process of its own, so that memory and thread pools do not mix; all are loaded first, then they
run in turn, round after round, so that what else happens on the machine happens to all of them.
"""
