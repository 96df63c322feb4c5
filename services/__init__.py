"""The mesh's processes: one folder each, one owner each of what it names. They meet on the bus only."""
