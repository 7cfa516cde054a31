"""A datastore on disk: manifest, shards of keys and values, documents, index. ``docs/datastore-format.md`` is normative."""
