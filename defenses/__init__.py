"""Training a model that does not know a concept any more, and the small networks that guard it.

One method a file, one shared trainer. Nothing heavy is imported here: `METHODS` names the modules, and
`safelight.defenses.run.defend` imports the one that is asked for.
"""

# method -> module; each holds a frozen `Config` and a function `objective(model, concepts, config)`
METHODS = {
    "sdd": "safelight.defenses.sdd",
    "safegen": "safelight.defenses.safegen",
    "dark_miner": "safelight.defenses.dark_miner",
    "safe_cfg": "safelight.defenses.safe_cfg",
    "safe_cfg_alignment": "safelight.defenses.alignment",
}
