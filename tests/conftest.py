"""The longest files go first: processes that share the tests by file (make test) then end at about the same time."""
LONGEST = 'killed distributed report runs executors models claims search keys encoders tables benchmarks cli web mining data'.split()

def pytest_collection_modifyitems(items):
    order = {f'test_{name}.py': i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
