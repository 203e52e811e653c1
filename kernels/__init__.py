"""Operations between the networks. Knows tensors, no model.

`reference` holds each operation in plain torch and is the definition; `host` holds the numpy twins that the
lean core needs; `philox` the counter-based random words that all bodies share.
"""
