"""Attackers, as measuring instruments: they look for requests that make a system draw the stand-in.

They work on the shipped stand-in alone. What they find lives in memory until it is measured; scores are
stored, findings never. Nothing heavy is imported here: `ATTACKS` names the modules, each of which holds
`FAMILY`, `BUDGET` and `craft(victim, tasks, budget, seed)`.
"""

# attack -> module
ATTACKS = {
    name: f"safelight.bench.attacks.{name}"
    for name in (
        "synonyms",
        "spelling",
        "restarts",
        "token_search",
        "concept_vector",
        "inversion",
        "checker_latent",
        "checker_embedding",
        "checker_prompt",
        "adaptive_redirector",
        "adaptive_probes",
        "adaptive_latent",
    )
}
