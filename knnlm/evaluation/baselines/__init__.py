"""What a kNN-LM must be measured against: simple things that read the same tokens, scored on the same targets.

An n-gram from the datastore's own tokens needs no model, and a continuous cache no datastore; where either comes close
to the kNN-LM, retrieval by the model's keys gained little.
"""
