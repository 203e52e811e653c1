"""Measurements: latency, memory and start-up of detection. Nothing imports this room but the command line."""
