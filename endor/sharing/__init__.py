"""Models that are elsewhere: headers alone, shards fetched as they are packed, uploads."""
