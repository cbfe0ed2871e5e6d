"""Frozen dataclasses from nested mappings, checked key by key."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

_CHOICES = 'choices'
_AT_LEAST = 'at_least'
_ABOVE = 'above'
_BELOW = 'below'
_OWN = 'own'


def key(
  default: Any, *, choices=None, at_least=None, above=None, below=None, own=''
) -> Any:
  """A field of a section and what its values may be.

  Args:
    default: its value where none is given.
    choices: all that there are.
    at_least: the least.
    above: what it must be more than.
    below: what it must be less than.
    own: what has one of these characters need be no choice.
  """
  metadata = {
    _CHOICES: choices,
    _AT_LEAST: at_least,
    _ABOVE: above,
    _BELOW: below,
    _OWN: own,
  }
  return dataclasses.field(default=default, metadata=metadata)


def build(cls: type, mapping: Any, where: str, problems: list[str]) -> Any:
  """One section.

  Args:
    cls: its dataclass, whose fields are values, sections, or tuples of these.
    mapping: keys and values; None for the default.
    where: dotted name in front of its keys.
    problems: what is wrong is added to them.
  """
  if not isinstance(mapping, Mapping):
    name = where.rstrip('.') or 'the whole of it'
    problems.append(f'{name} is {mapping!r}, not a section of keys')
    return cls()
  fields = {f.name: f for f in dataclasses.fields(cls)}
  types = typing.get_type_hints(cls)
  values = {}
  for key, value in mapping.items():
    if key not in fields:
      near = difflib.get_close_matches(str(key), fields, 1)
      hint = f', did you mean {where}{near[0]}?' if near else ''
      problems.append(f'{where}{key} is no key{hint}')
    elif value is None:
      continue
    elif dataclasses.is_dataclass(types[key]):
      values[key] = build(types[key], value, f'{where}{key}.', problems)
    elif typing.get_origin(types[key]) is tuple:
      section = typing.get_args(types[key])[0]
      values[key] = _several(section, value, f'{where}{key}', problems)
    else:
      values[key] = _value(
        value, types[key], fields[key].metadata, f'{where}{key}', problems
      )
  return cls(**values)


def indices(name: str, text: str) -> tuple[int, ...]:
  """Numbers with commas.

  Raises:
    ValueError: `text`, the value of the key `name`, is none.

  >>> indices('layers', '0, 2')
  (0, 2)
  """
  numbers = [i.strip() for i in text.split(',') if i.strip()]
  if not all(i.isdecimal() for i in numbers):
    raise ValueError(
      f'{name} {text!r} is not numbers with commas, such as 0,1,2'
    )
  return tuple(map(int, numbers))


def pattern(text: str, number: type) -> dict[str, Any]:
  """Numbers by regex.

  Raises:
    ValueError: names what is none.

  >>> pattern('down_proj=16,layers.0.*=4', int)
  {'down_proj': 16, 'layers.0.*': 4}
  """
  found = {}
  for entry in filter(None, (e.strip() for e in text.split(','))):
    regex, equals, value = entry.rpartition('=')
    try:
      found[regex.strip()] = number(value)
    except ValueError:
      equals = ''
    if not (equals and regex.strip() and math.isfinite(found[regex.strip()])):
      raise ValueError(f'{entry!r} is not REGEX={number.__name__}')
  return found


def _several(
  cls: type, value: Any, where: str, problems: list[str]
) -> tuple[Any, ...]:
  """Sections in a tuple, or in the list that JSON makes of it."""
  if value == ('',):  # what ml_collections makes of `--config.key=`
    return ()
  if not isinstance(value, tuple | list) or any(
    not isinstance(each, Mapping) for each in value
  ):
    problems.append(
      f"{where} is {value!r}, not a tuple of sections ({{'key': value}},): even"
      ' one alone has a comma after it'
    )
    return ()
  return tuple(
    build(cls, each, f'{where}[{i}].', problems) for i, each in enumerate(value)
  )


def _value(
  value: Any,
  kind: type,
  metadata: Mapping[str, Any],
  where: str,
  problems: list[str],
) -> Any:
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  choices = metadata.get(_CHOICES)
  at_least, below = metadata.get(_AT_LEAST), metadata.get(_BELOW)
  above = metadata.get(_ABOVE)
  own = set(str(metadata.get(_OWN, '')))
  if type(value) is not kind:
    problems.append(
      f'{where} is {value!r}, a {type(value).__name__}, not a {kind.__name__}'
    )
  elif choices and value not in choices and not own & set(str(value)):
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f' (did you mean {near[0]}?)' if near else ''
    known = ', '.join(choice or "''" for choice in choices)
    problems.append(f'{where} is {value!r}, none of {known}{hint}')
  elif isinstance(value, float) and not math.isfinite(value):
    problems.append(f'{where} is {value}, not a finite number')
  elif at_least is not None and value < at_least:
    problems.append(f'{where} is {value}, below {at_least}')
  elif above is not None and value <= above:
    problems.append(f'{where} is {value}, not above {above}')
  elif below is not None and value >= below:
    problems.append(f'{where} is {value}, not below {below}')
  return value
