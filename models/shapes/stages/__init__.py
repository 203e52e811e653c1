"""The stages of training the shipped model, one network a file; `loop` runs a stage and resumes it."""
