"""Served speed, measured: ``speculators bench``.

===============  ==================================================================================
``run``          one measurement from the prompts to the report: which servers, one after another
``measurement``  a server at several concurrencies, and two servers' results beside each other
``load``         prompts that are continued so many at a time, each token with its time
``counters``     what a server counts of its drafts
``report``       ``bench.json``, the table and the plot
===============  ==================================================================================
"""
