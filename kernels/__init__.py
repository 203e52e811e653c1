"""Operations between the networks. Knows tensors, no model.

`reference` holds each operation in plain torch and is the definition; `host` holds the numpy twins that the
lean core needs; `philox` the counter-based random words that all bodies share. `fused` composes what one
launch does of the reference, `triton` holds its compiled bodies, and `ops` runs whichever `dispatch` chooses.
"""
