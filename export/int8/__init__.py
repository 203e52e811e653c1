"""From a bundle to one whose detectors also have a form in int8: calibrated, rewritten, compared."""
