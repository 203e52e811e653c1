"""Opens a bundle and runs it: detect, generate. Knows no training, no export and no HTTP."""
