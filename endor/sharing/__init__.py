"""Models that are elsewhere: headers without weights, shards fetched as they are packed, uploads."""
