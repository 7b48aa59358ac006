// The accounts' work for each request, compiled if possible. shares.py and accounting.py do the same in Python;
// they are the reference and explain it. A test compares the two, to the last bit of a sum.
//
// This handles only what nearly every request needs: a share without a switch, and the row of an answer that
// reports its tokens in the usual form. Every other case is passed to Python's `otherwise` before anything has
// been changed. Only CPython's stable ABI is used, so that one file fits every version. Calls keep the GIL.
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <structmember.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    double now, clock, held, house, switch_seconds;  // see `Tally` in shares.py
    char holds, switching, plain;
    PyObject *running;
    double rest, epoch;
    Py_ssize_t made, room;
    PyObject *left, *prices, *ledger, *waiting, *otherwise;
} Tally;

enum { REQUEST, REQUEST_ID, ASKED, MODEL, TICKET, ID, ARRIVED, WAITED, AWAKE, NAMES };
static const char *const TEXTS[NAMES] = {"request", "request_id", "asked",  "model", "ticket",
                                         "id",      "arrived",    "waited", "awake"};
static PyObject *names[NAMES], *empty, *zero;

enum { ARGUMENTS = 8, FIELDS = 25, DIGITS = 12, TIMINGS = 12 };
static const double MOST = 9e15;  // up to here a double holds every integer

static void pass_to(Tally *t, double now) {
    double past = now - t->now;
    if (!(past > 0)) return;
    t->now = now;
    if (!t->holds) return;
    t->held += past;
    Py_ssize_t parts = PyDict_Size(t->running) + (t->switching != 0);
    if (!parts) {
        t->house += past;
        return;
    }
    double part = past / (double)parts;
    t->clock += part;
    if (t->switching) t->switch_seconds += part;
}

static PyObject *tally_pass_to(PyObject *self, PyObject *now) {
    double time = PyFloat_AsDouble(now);
    if (time == -1.0 && PyErr_Occurred()) return NULL;
    pass_to((Tally *)self, time);
    Py_RETURN_NONE;
}

static PyObject *tally_admitted(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Tally *t = (Tally *)self;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "admitted() takes a time and an effect");
    double time = PyFloat_AsDouble(args[0]);
    if (time == -1.0 && PyErr_Occurred()) return NULL;
    pass_to(t, time);
    PyObject *request = PyObject_GetAttr(args[1], names[REQUEST]);
    if (!request) return NULL;
    int there = PyDict_Contains(t->running, request), failed = there < 0;
    if (!there) {
        PyObject *since = PyFloat_FromDouble(t->clock);
        failed = !since || PyDict_SetItem(t->running, request, since);
        Py_XDECREF(since);
    }
    Py_DECREF(request);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

// Remove a request from those in flight: returns its own part, 0 if it was not in flight, -1 with an exception.
static double over(Tally *t, double now, PyObject *request) {
    pass_to(t, now);
    PyObject *since = PyDict_GetItemWithError(t->running, request);
    if (!since) return PyErr_Occurred() ? -1.0 : 0.0;
    double own = t->clock - PyFloat_AsDouble(since);
    return PyDict_DelItem(t->running, request) ? -1.0 : own;
}

static PyObject *tally_over(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "over() takes a time and a request");
    double time = PyFloat_AsDouble(args[0]);
    if (time == -1.0 && PyErr_Occurred()) return NULL;
    double own = over((Tally *)self, time, args[1]);
    return own == -1.0 && PyErr_Occurred() ? NULL : PyFloat_FromDouble(own);
}

// `int(seconds * scale)` if that is in the usual range; else 0, and `fits` is cleared.
static long long whole(double value, int *fits) {
    if (!(fabs(value) < MOST)) {
        *fits = 0;
        return 0;
    }
    return (long long)value;
}

static PyObject *or_empty(PyObject *text) { return text == Py_None ? empty : text; }

static PyObject *pass_on(Tally *t, PyObject *const *args) {
    return PyObject_CallFunctionObjArgs(t->otherwise, args[0], args[1], args[2], args[3], args[4], args[5], args[6],
                                        args[7], NULL);
}

// `Accounting.ended`: request, number, now, waited, status, failure, key, report.
static PyObject *tally_ended(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Tally *t = (Tally *)self;
    if (count != ARGUMENTS) return PyErr_Format(PyExc_TypeError, "ended() takes %d arguments", ARGUMENTS);
    PyObject *request = args[0], *report = args[7], *got[NAMES] = {NULL}, *row = NULL, *share = NULL;
    if (!t->plain || t->ledger == Py_None || t->left != Py_None || t->waiting == Py_None || !PyTuple_Check(report) ||
        PyList_Size(t->waiting) >= t->room)
        return pass_on(t, args);
    int usual = 1, fits = 1;
    got[AWAKE] = PyObject_GetAttr(t->ledger, names[AWAKE]);
    if (!got[AWAKE]) goto end;
    usual = got[AWAKE] == Py_True;
    for (int at = REQUEST_ID; usual && at <= TICKET; at++)
        if (!(got[at] = PyObject_GetAttr(request, names[at]))) goto end;
    usual = usual && got[TICKET] != Py_None;
    for (int at = ID; usual && at <= WAITED; at++)
        if (!(got[at] = PyObject_GetAttr(got[TICKET], names[at]))) goto end;
    if (!usual) {
        share = pass_on(t, args);
        goto end;
    }
    double now = PyFloat_AsDouble(args[2]), waited = PyFloat_AsDouble(args[3]);
    double arrived = PyFloat_AsDouble(got[ARRIVED]), queued = PyFloat_AsDouble(got[WAITED]);
    if (PyErr_Occurred()) goto end;
    long long time = whole((t->epoch + now) * 1000, &fits), queue = whole(waited * 1000, &fits);
    long long service = whole((now - arrived - queued) * 1000, &fits);
    whole(t->held * 1e6, &fits);  // an upper bound of any share
    if (!fits) {
        share = pass_on(t, args);
        goto end;
    }
    double own = over(t, now, got[ID]);
    if (own == -1.0 && PyErr_Occurred()) goto end;
    double exact = own * 1e6 + t->rest;
    long long micros = (long long)exact;
    PyObject *read = PyTuple_GetItem(report, 0), *wrote = PyTuple_GetItem(report, 1);
    PyObject *model = or_empty(got[MODEL]);
    if (!read || !wrote) goto end;
    PyObject *numbers[] = {PyLong_FromLongLong(time), PyLong_FromLongLong(queue), PyLong_FromLongLong(service),
                           PyLong_FromLongLong(micros)};
    PyObject *const fields[FIELDS] = {
        numbers[0], got[REQUEST_ID], or_empty(args[6]), or_empty(got[ASKED]), model, model, read, zero, wrote, zero,
        zero, zero, empty, Py_None, numbers[1], numbers[2], numbers[3], zero, Py_None, Py_None, args[4],
        or_empty(args[5]), zero, args[1], t->prices,
    };
    if (numbers[0] && numbers[1] && numbers[2] && numbers[3] && (row = PyTuple_New(FIELDS))) {
        for (Py_ssize_t at = 0; at < FIELDS; at++) {
            Py_INCREF(fields[at]);
            PyTuple_SetItem(row, at, fields[at]);
        }
        if (!PyList_Append(t->waiting, row)) {
            t->rest = exact - (double)micros;
            t->made++;
            share = PyFloat_FromDouble(own);
        }
        Py_DECREF(row);
    }
    for (size_t at = 0; at < sizeof numbers / sizeof *numbers; at++) Py_XDECREF(numbers[at]);
end:
    for (int at = 0; at < NAMES; at++) Py_XDECREF(got[at]);
    return share;
}

static const char *after(const char *at, const char *end, const char *text) {
    size_t length = strlen(text);
    return at && (size_t)(end - at) >= length && !memcmp(at, text, length) ? at + length : NULL;
}

static const char *blank(const char *at, const char *end) { return at && at < end && *at == ' ' ? at + 1 : at; }

static const char *number(const char *at, const char *end, int most, long long *found) {
    const char *first = at;
    long long value = 0;
    for (; at && at < end && *at >= '0' && *at <= '9' && (!most || at - first < most); at++)
        if (most) value = value * 10 + (*at - '0');
    *found = value;
    return at == first ? NULL : at;
}

// `"name": ` and a number.
static const char *figure(const char *at, const char *end, const char *name, int most, long long *found) {
    return number(blank(after(at, end, name), end), end, most, found);
}

static const char *comma(const char *at, const char *end) { return blank(after(at, end, ","), end); }

// Return what follows a report in the usual form; NULL if it is not one.
static const char *usual(const char *at, const char *end, long long *read, long long *wrote) {
    long long total;
    at = after(blank(after(at, end, "\"usage\":"), end), end, "{");
    at = comma(figure(at, end, "\"prompt_tokens\":", DIGITS, read), end);
    if (!at) return NULL;
    const char *rest = figure(at, end, "\"completion_tokens\":", DIGITS, wrote);
    if (rest) {
        at = figure(comma(rest, end), end, "\"total_tokens\":", 0, &total);
        at = at ? at : rest;
    } else {
        at = comma(figure(at, end, "\"total_tokens\":", 0, &total), end);
        at = figure(at, end, "\"completion_tokens\":", DIGITS, wrote);
    }
    if (!at) return NULL;
    rest = after(at, end, "}");
    if (rest) return rest;
    return after(blank(after(comma(at, end), end, "\"prompt_tokens_details\":"), end), end, "null}");
}

static PyObject *report_of(const char *text, size_t length) {
    static const char name[] = "\"usage\"", timings[] = "\"timings\"";
    const char *end = text + length, *at = end;
    size_t size = sizeof name - 1;
    do {  // find the last quote that begins the name
        at = length >= size ? memrchr(text, '"', (size_t)(at - text)) : NULL;
    } while (at && ((size_t)(end - at) < size || memcmp(at, name, size)));
    if (!at) Py_RETURN_NONE;
    long long read, wrote;
    const char *rest = usual(at, end, &read, &wrote);
    if (!rest || (end - rest > TIMINGS && memmem(at, (size_t)(end - at), timings, sizeof timings - 1))) Py_RETURN_NONE;
    PyObject *first = PyLong_FromLongLong(read), *second = PyLong_FromLongLong(wrote);
    PyObject *found = first && second ? PyTuple_Pack(2, first, second) : NULL;
    Py_XDECREF(first);
    Py_XDECREF(second);
    return found;
}

// `tokens.told`.
static PyObject *told(PyObject *module, PyObject *tail) {
    (void)module;
    if (!PyList_Check(tail)) return PyErr_Format(PyExc_TypeError, "told() takes a list");
    Py_ssize_t count = PyList_Size(tail), length = 0, done = 0;
    for (Py_ssize_t at = 0; at < count; at++) {
        char *bytes;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PyList_GetItem(tail, at), &bytes, &size)) return NULL;
        if (count == 1) return report_of(bytes, (size_t)size);
        length += size;
    }
    char *text = PyMem_Malloc((size_t)length + 1);
    if (!text) return PyErr_NoMemory();
    for (Py_ssize_t at = 0; at < count; at++) {
        char *bytes;
        Py_ssize_t size;
        PyBytes_AsStringAndSize(PyList_GetItem(tail, at), &bytes, &size);
        memcpy(text + done, bytes, (size_t)size);
        done += size;
    }
    PyObject *found = report_of(text, (size_t)length);
    PyMem_Free(text);
    return found;
}

// ---- for many rows, in the ledger's thread

// Indices in a row (`ledger_file.Row`).
enum { TIME = 0, KEY = 2, SERVED = 4, CURRENCY = 12, STATUS = 20, KIND = 22, SUMMED = 10, PLACES = 16, COLUMNS = 32 };
static const Py_ssize_t SUMMED_BY[SUMMED] = {6, 7, 8, 9, 10, 11, 14, 15, 16, 17};
static const long long HOUR = 3600000, ERROR_STATUS = 400, LARGE = 1LL << 40;

typedef struct {
    PyObject *key, *served, *currency;
    long long hour, sums[2 + SUMMED];
} Place;

static int same_text(PyObject *one, PyObject *other) {
    return one == other || (PyUnicode_Check(one) && PyUnicode_Check(other) && !PyUnicode_Compare(one, other));
}

// Return a number of a row; `fits` is cleared if it is none, or so large that a sum might overflow.
static long long number_of(PyObject *row, Py_ssize_t at, int *fits) {
    PyObject *item = PyTuple_GetItem(row, at);
    if (!item || !PyLong_Check(item)) {
        *fits = 0;
        return 0;
    }
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (!overflow && value <= LARGE * 8 && value >= -LARGE) return value;
    *fits = 0;
    return 0;
}

static PyObject *sums_as_dict(const Place *places, int count) {
    PyObject *found = PyDict_New();
    for (int at = 0; found && at < count; at++) {
        const Place *one = &places[at];
        PyObject *name = Py_BuildValue("(LOOO)", one->hour, one->key, one->served, one->currency);
        PyObject *sums = PyList_New(2 + SUMMED);
        int failed = !name || !sums;
        for (Py_ssize_t column = 0; !failed && column < 2 + SUMMED; column++) {
            PyObject *sum = PyLong_FromLongLong(one->sums[column]);
            failed = !sum || PyList_SetItem(sums, column, sum);
        }
        failed = failed || PyDict_SetItem(found, name, sums);
        Py_XDECREF(name);
        Py_XDECREF(sums);
        if (failed) Py_CLEAR(found);
    }
    return found;
}

// `ledger_file.sums_of` for a list; None if there are many places, or unusual values.
static PyObject *sums_of(PyObject *self, PyObject *rows) {
    (void)self;
    Place places[PLACES];
    int count = 0, fits = PyList_Check(rows);
    Py_ssize_t size = fits ? PyList_Size(rows) : 0;
    for (Py_ssize_t at = 0; at < size && fits; at++) {
        PyObject *row = PyList_GetItem(rows, at);
        if (!row || !PyTuple_Check(row) || PyTuple_Size(row) <= KIND) {
            fits = 0;
            break;
        }
        long long time = number_of(row, TIME, &fits), kind = number_of(row, KIND, &fits);
        long long status = number_of(row, STATUS, &fits);
        PyObject *key = PyTuple_GetItem(row, KEY), *served = PyTuple_GetItem(row, SERVED);
        PyObject *currency = PyTuple_GetItem(row, CURRENCY);
        if (!fits || time < 0) {
            fits = 0;
            break;
        }
        int place = 0;
        while (place < count && !(places[place].hour == time / HOUR && same_text(places[place].key, key) &&
                                  same_text(places[place].served, served) &&
                                  same_text(places[place].currency, currency)))
            place++;
        if (place == count) {
            if (count == PLACES) {
                fits = 0;
                break;
            }
            places[count++] = (Place){key, served, currency, time / HOUR, {0}};
        }
        long long *sums = places[place].sums;
        sums[0] += !kind;
        sums[1] += !kind && status >= ERROR_STATUS;
        for (int column = 0; column < SUMMED; column++) sums[2 + column] += number_of(row, SUMMED_BY[column], &fits);
    }
    if (PyErr_Occurred()) PyErr_Clear();
    if (!fits) Py_RETURN_NONE;
    return sums_as_dict(places, count);
}

static int read_groups(PyObject *groups, Py_ssize_t which, Py_ssize_t *to, Py_ssize_t width, int room) {
    PyObject *group = PyTuple_GetItem(groups, which);
    int count = 0;
    Py_ssize_t size = group ? PyTuple_Size(group) : -1;
    if (size < 0) return -1;
    for (Py_ssize_t at = 0; at < size; at++) {
        Py_ssize_t column = PyLong_AsSsize_t(PyTuple_GetItem(group, at));
        if (column < 0 || column >= width || count == room) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "no such column");
            return -1;
        }
        to[count++] = column;
    }
    return count;
}

// Whether all rows have the same value in a column; -1 with an exception.
static int alike_in(PyObject *rows, Py_ssize_t begin, Py_ssize_t size, Py_ssize_t column) {
    PyObject *first = PyTuple_GetItem(PyList_GetItem(rows, begin), column);
    for (Py_ssize_t at = 1; at < size; at++) {
        PyObject *item = PyTuple_GetItem(PyList_GetItem(rows, begin + at), column);
        int equal = item == first ? 1 : first && item ? PyObject_RichCompareBool(item, first, Py_EQ) : -1;
        if (equal <= 0) return equal;
    }
    return 1;
}

// `ledger_file._bound`: rows, start, number of rows, number of columns, groups of columns.
static PyObject *bound(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *rows, *groups;
    Py_ssize_t begin, size, width, once[COLUMNS], each[COLUMNS];
    if (!PyArg_ParseTuple(args, "OnnnO", &rows, &begin, &size, &width, &groups)) return NULL;
    if (!PyList_Check(rows) || !PyTuple_Check(groups) || begin < 0 || size < 1 || size > PyList_Size(rows) - begin ||
        width < 0 || width > COLUMNS)
        return PyErr_Format(PyExc_ValueError, "bound() cannot take these rows");
    for (Py_ssize_t at = begin; at < begin + size; at++) {
        PyObject *row = PyList_GetItem(rows, at);
        if (!PyTuple_Check(row) || PyTuple_Size(row) < width)
            return PyErr_Format(PyExc_ValueError, "bound() takes rows of %zd columns", width);
    }
    int first = 0, others = 0, taken[COLUMNS] = {0};
    PyObject *alike = PyTuple_New(PyTuple_Size(groups)), *values = NULL;
    for (Py_ssize_t which = 0; alike && which < PyTuple_Size(groups); which++) {
        int count = read_groups(groups, which, once + first, width, COLUMNS - first), same = 1;
        for (int at = 0; at < count && same > 0; at++) same = alike_in(rows, begin, size, once[first + at]);
        if (count < 0 || same < 0 || PyTuple_SetItem(alike, which, PyBool_FromLong(same))) goto failed;
        for (int at = 0; at < count && same; at++) taken[once[first + at]] = 1;
        first += same ? count : 0;
    }
    for (Py_ssize_t column = 0; column < width; column++)
        if (!taken[column]) each[others++] = column;
    values = alike ? PyList_New(first + size * others) : NULL;
    if (!values) goto failed;
    Py_ssize_t place = 0;
    for (Py_ssize_t at = 0; at < size; at++) {
        PyObject *row = PyList_GetItem(rows, begin + at);
        for (int from = 0; !at && from < first; from++) {
            PyObject *item = PyTuple_GetItem(row, once[from]);
            Py_INCREF(item);
            PyList_SetItem(values, place++, item);
        }
        for (int from = 0; from < others; from++) {
            PyObject *item = PyTuple_GetItem(row, each[from]);
            Py_INCREF(item);
            PyList_SetItem(values, place++, item);
        }
    }
    return Py_BuildValue("(NN)", alike, values);
failed:
    Py_XDECREF(alike);
    return NULL;
}

// ---- the type

static PyObject **objects(Tally *t, int at) {
    PyObject **all[] = {&t->left, &t->prices, &t->ledger, &t->waiting, &t->otherwise, &t->running};
    return at < (int)(sizeof all / sizeof *all) ? all[at] : NULL;
}

static PyObject *tally_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    if (PyObject_Size(args) || kwargs) return PyErr_Format(PyExc_TypeError, "Tally() takes no arguments");
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Tally *t = (Tally *)allocate(type, 0);
    if (!t) return NULL;
    t->plain = 1;
    for (int at = 0; objects(t, at); at++) {
        Py_INCREF(Py_None);
        *objects(t, at) = Py_None;
    }
    Py_DECREF(t->running);
    t->running = PyDict_New();
    if (t->running) return (PyObject *)t;
    Py_DECREF(t);
    return NULL;
}

static int tally_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    for (int at = 0; objects((Tally *)self, at); at++) Py_VISIT(*objects((Tally *)self, at));
    return 0;
}

static int tally_clear(PyObject *self) {
    for (int at = 0; objects((Tally *)self, at); at++) Py_CLEAR(*objects((Tally *)self, at));
    return 0;
}

static void tally_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    tally_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

#define MEMBER(name, type, flags) {#name, type, offsetof(Tally, name), flags, NULL}
static PyMemberDef members[] = {
    MEMBER(now, T_DOUBLE, 0), MEMBER(clock, T_DOUBLE, 0), MEMBER(held, T_DOUBLE, 0), MEMBER(house, T_DOUBLE, 0),
    MEMBER(switch_seconds, T_DOUBLE, 0), MEMBER(holds, T_BOOL, 0), MEMBER(switching, T_BOOL, 0),
    MEMBER(plain, T_BOOL, 0), MEMBER(running, T_OBJECT_EX, READONLY), MEMBER(rest, T_DOUBLE, 0),
    MEMBER(epoch, T_DOUBLE, 0), MEMBER(made, T_PYSSIZET, 0), MEMBER(room, T_PYSSIZET, 0), MEMBER(left, T_OBJECT_EX, 0),
    MEMBER(prices, T_OBJECT_EX, 0), MEMBER(ledger, T_OBJECT_EX, 0), MEMBER(waiting, T_OBJECT_EX, 0),
    MEMBER(otherwise, T_OBJECT_EX, 0), {NULL, 0, 0, 0, NULL},
};
#define FAST(function) ((PyCFunction)(void (*)(void))function)
static PyMethodDef methods[] = {
    {"pass_to", tally_pass_to, METH_O, NULL},
    {"admitted", FAST(tally_admitted), METH_FASTCALL, NULL},
    {"over", FAST(tally_over), METH_FASTCALL, NULL},
    {"ended", FAST(tally_ended), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot slots[] = {
    {Py_tp_new, tally_new},         {Py_tp_dealloc, tally_dealloc}, {Py_tp_traverse, tally_traverse},
    {Py_tp_clear, tally_clear},     {Py_tp_members, members},       {Py_tp_methods, methods},
    {0, NULL},
};
static PyType_Spec spec = {"llmux.accounts._tally.Tally", sizeof(Tally), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};
static PyMethodDef functions[] = {
    {"told", told, METH_O, NULL},
    {"sums_of", sums_of, METH_O, NULL},
    {"bound", bound, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_tally", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__tally(void) {
    for (int at = 0; at < NAMES; at++)
        if (!names[at] && !(names[at] = PyUnicode_InternFromString(TEXTS[at]))) return NULL;
    if (!empty && !(empty = PyUnicode_InternFromString(""))) return NULL;
    if (!zero && !(zero = PyLong_FromLong(0))) return NULL;
    PyObject *made = PyModule_Create(&module), *type = PyType_FromSpec(&spec);
    if (made && type && !PyModule_AddObjectRef(made, "Tally", type)) {
        Py_DECREF(type);
        return made;
    }
    Py_XDECREF(made);
    Py_XDECREF(type);
    return NULL;
}
