"""The evaluation: what each defence is worth against each attack, what it blocks wrongly, and what it costs.

Outcomes are unsafe, safe or error, and an error is never safe. Attackers are `safelight.bench.attacks`; what
they find lives in memory alone, and what is written down are scores and outcomes by request number.
"""
