/* The load generator: asks a server for services over many connections, checks every reply, counts and times them.
 *
 *     load PROTOCOL --port N [--work read|write|create|ping] [--connections N] [--depth N] [--names N]
 *          [--warm S] [--seconds S] [--once] [--count-from N] [--verify N] [--server PID] [--hold]
 *
 * One thread and one epoll. Each connection sends `depth` requests in one piece, waits for all their replies, and
 * sends the next ones. The names are asked for in a shuffled order that is always the same, and each connection has
 * names of its own, so it is known who wrote one last. The first wrong reply ends the run with status 1. At the end
 * one line of JSON: what was done in `seconds`, after `warm` seconds that do not count.
 *
 * --once       each name once, without a clock: to fill a server
 * --verify N   after writing, read up to N of the names written, which must hold what was written last
 * --server PID the process whose share of a processor is told
 * --hold       when done, keep the connections until the input ends
 */
#include "load.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

static struct {
    int port, once, hold;
    uint32_t connections, depth, names, count_from, verify;
    double warm_s, seconds;
    long server;
    enum work work;
} options = {.connections = 50, .depth = 1, .names = 1000, .seconds = 1, .work = READ};

static struct protocol *protocol;
static struct connection *connections;
static int epoll;
static uint32_t *order;       /* the names, shuffled */
static uint32_t *last_count;  /* what was written last to each, 0 for nothing */
static uint64_t begin_ns, end_ns; /* of the time that counts */
static struct histogram histogram;
static uint64_t replies, lost;
static uint32_t count;
static int verifying;

static void shuffle(void) {
    uint64_t random = 0x9E3779B97F4A7C15u;
    order = calloc(options.names, sizeof *order);
    last_count = calloc(options.names, sizeof *last_count);
    for (uint32_t n = 0; n < options.names; n++)
        order[n] = n;
    for (uint32_t n = options.names - 1; n > 0; n--) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        uint32_t other = (uint32_t)(random % (n + 1)), kept = order[n];
        order[n] = order[other];
        order[other] = kept;
    }
}

/* The next name of a connection: all those whose place in the order is its number, by the number of connections. */
static uint32_t next_key(struct connection *connection) {
    uint32_t own = options.names / options.connections;
    return order[connection->number + (connection->turn++ % own) * options.connections];
}

static int nothing_left(const struct connection *connection) {
    return (options.once || verifying) && connection->turn == connection->last_turn;
}

static size_t put_request(struct connection *connection, char *out, uint64_t now) {
    struct slot *slot = &connection->slots[connection->asked % SLOTS];
    if (slot->busy)
        die("a reply is overdue by %d others", SLOTS);
    slot->busy = 1;
    slot->work = verifying ? READ : options.work;
    slot->sent_ns = now;
    slot->held_length = 0;
    slot->asked = (struct asked){next_key(connection), 0, connection->asked++, connection->number};
    if (verifying)
        slot->asked.count = last_count[slot->asked.key];
    else if (options.work == WRITE)
        slot->asked.count = last_count[slot->asked.key] = options.count_from + count++;
    connection->outstanding++;
    return card_fill(&protocol->request[slot->work], &slot->asked, out);
}

static void ask(struct connection *connection, uint64_t now) {
    static char out[DEPTH_MAX * CARD_BYTES];
    size_t length = 0;
    for (uint32_t n = 0; n < options.depth && !nothing_left(connection); n++)
        length += put_request(connection, out + length, now);
    if (length > 0)
        say(connection, out, length);
}

static void open_connection(struct connection *connection) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = connection}};
    dial(connection, protocol, options.port);
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, connection->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

static void check(const struct slot *slot, const struct answer *answer) {
    const struct card *card = &protocol->reply[slot->work];
    char request[CARD_BYTES], right[CARD_BYTES];
    if (card_matches(card, &slot->asked, answer->payload, answer->length))
        return;
    size_t request_length = card_fill(&protocol->request[slot->work], &slot->asked, request);
    size_t right_length = card_fill(card, &slot->asked, right);
    die("wrong reply to svc-%06u\nasked %.*s\nright %.*s\ncame  %.*s", slot->asked.key, (int)request_length, request,
        (int)right_length, right, (int)answer->length, answer->payload);
}

static void finish(struct connection *connection, const struct answer *answer, uint64_t now) {
    struct slot *slot = &connection->slots[answer->slot % SLOTS];
    if (!slot->busy)
        die("a reply that nobody asked for: %.*s", (int)answer->length, answer->payload);
    check(slot, answer);
    slot->busy = 0;
    connection->outstanding--;
    if (now >= begin_ns && now < end_ns) {
        histogram_add(&histogram, now - slot->sent_ns);
        replies++;
    }
}

/* Take what has come; whether the connection may ask again. */
static int receive(struct connection *connection, uint64_t *now) {
    ssize_t length = recv(connection->fd, connection->input + connection->input_length,
        INPUT_BYTES - connection->input_length, MSG_DONTWAIT);
    if (length < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (length <= 0) {
        if (!(protocol->single && options.work == READ) || connection->outstanding > 0)
            die("connection %u was closed", connection->number);
        close(connection->fd);
        return 1;
    }
    *now = now_ns();
    connection->input_length += (size_t)length;
    size_t at = 0;
    while (at < connection->input_length) {
        struct answer answer = {0};
        size_t taken = protocol->take(connection, connection->input + at, connection->input_length - at, &answer);
        if (taken == 0)
            break;
        if (answer.kind == ANSWER)
            finish(connection, &answer, *now);
        at += taken;
    }
    if (at == 0 && connection->input_length == INPUT_BYTES)
        die("a reply is longer than %d bytes", INPUT_BYTES);
    connection->input_length -= at;
    memmove(connection->input, connection->input + at, connection->input_length);
    return connection->outstanding == 0 && !(protocol->single && options.work == READ);
}

struct shares {
    uint64_t at_ns;
    double own_s, server_s;
};

/* Processor time so far: our own, and the server's with all its threads. */
static struct shares shares(void) {
    struct shares found = {.at_ns = now_ns()};
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    found.own_s = (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) +
                  (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6;
    if (options.server) {
        char path[64], text[1024] = "";
        snprintf(path, sizeof path, "/proc/%ld/stat", options.server);
        FILE *file = fopen(path, "r");
        if (file == NULL || fread(text, 1, sizeof text - 1, file) == 0)
            die("no process %ld", options.server);
        fclose(file);
        unsigned long user = 0, system = 0;
        char *fields = strrchr(text, ')');
        if (fields == NULL ||
            sscanf(fields + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
            die("%s is not as it should be", path);
        found.server_s = (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
    }
    return found;
}

static void count_lost(void) {
    for (uint32_t n = 0; n < options.connections; n++)
        lost += (uint32_t)connections[n].outstanding;
}

/* Let all connections ask until the time is over or there is nothing left to ask for, and all replies are there. */
static void run(struct shares *from, struct shares *to) {
    struct epoll_event events[256];
    uint64_t now = now_ns();
    uint32_t busy = options.connections;
    begin_ns = now + (uint64_t)(options.warm_s * 1e9);
    end_ns = options.once || verifying ? UINT64_MAX : begin_ns + (uint64_t)(options.seconds * 1e9);
    memset(from, 0, sizeof *from);
    memset(to, 0, sizeof *to);
    for (uint32_t n = 0; n < options.connections; n++)
        ask(&connections[n], now);
    while (busy > 0) {
        int found = epoll_wait(epoll, events, 256, 10000);
        if (found == 0 && !protocol->may_lose)
            die("no reply for 10 s");
        if (found == 0 && busy == options.connections)
            die("no replies at all for 10 s");
        if (found == 0) {
            count_lost();
            break;
        }
        now = now_ns();
        if (from->at_ns == 0 && now >= begin_ns)
            *from = shares();
        if (to->at_ns == 0 && now >= end_ns)
            *to = shares();
        for (int n = 0; n < found; n++) {
            struct connection *connection = events[n].data.ptr;
            if (!receive(connection, &now))
                continue;
            if (now >= end_ns || nothing_left(connection)) {
                busy--;
                continue;
            }
            if (protocol->single && options.work == READ) {
                now = now_ns();
                open_connection(connection);
            }
            ask(connection, now);
        }
    }
    if (to->at_ns == 0)
        *to = shares();
}

/* Read names that were written, and be sure that they hold what was written last. */
static void verify(void) {
    struct shares from, to;
    uint32_t enough = (options.verify + options.connections - 1) / options.connections;
    verifying = 1;
    for (uint32_t n = 0; n < options.connections; n++) {
        uint32_t written = connections[n].turn;
        connections[n].last_turn = written < enough ? written : enough;
        connections[n].turn = 0;
    }
    run(&from, &to);
}

static void leave(void) {
    static const struct asked nothing;
    char farewell[CARD_BYTES];
    size_t length = card_fill(&protocol->farewell, &nothing, farewell);
    for (uint32_t n = 0; n < options.connections && length > 0; n++)
        say(&connections[n], farewell, length);
    for (uint32_t n = 0; n < options.connections && length > 0; n++)
        while (recv(connections[n].fd, farewell, sizeof farewell, 0) > 0)
            ;
}

static enum work work_named(const char *word) {
    static const char *const words[WORKS] = {"read", "write", "create", "ping"};
    for (enum work work = READ; work < WORKS; work++)
        if (strcmp(word, words[work]) == 0)
            return work;
    die("no work is called %s", word);
}

static void read_options(int count_of, char **words) {
    static const struct option known[] = {{"port", 1, 0, 'p'}, {"work", 1, 0, 'w'}, {"connections", 1, 0, 'c'},
        {"depth", 1, 0, 'd'}, {"names", 1, 0, 'n'}, {"warm", 1, 0, 'W'}, {"seconds", 1, 0, 's'}, {"once", 0, 0, 'o'},
        {"count-from", 1, 0, 'f'}, {"verify", 1, 0, 'v'}, {"server", 1, 0, 'P'}, {"hold", 0, 0, 'h'}, {0, 0, 0, 0}};
    for (int letter; (letter = getopt_long(count_of, words, "", known, NULL)) != -1;) {
        uint32_t number = optarg ? (uint32_t)strtoul(optarg, NULL, 10) : 0;
        switch (letter) {
        case 'p': options.port = (int)number; break;
        case 'w': options.work = work_named(optarg); break;
        case 'c': options.connections = number; break;
        case 'd': options.depth = number; break;
        case 'n': options.names = number; break;
        case 'W': options.warm_s = strtod(optarg, NULL); break;
        case 's': options.seconds = strtod(optarg, NULL); break;
        case 'o': options.once = 1; break;
        case 'f': options.count_from = number; break;
        case 'v': options.verify = number; break;
        case 'P': options.server = (long)number; break;
        case 'h': options.hold = 1; break;
        default: exit(2);
        }
    }
    if (optind != count_of - 1 || (protocol = protocol_named(words[optind])) == NULL)
        die("name one protocol");
    if (protocol->request[options.work].length == 0)
        die("%s is not asked for that", protocol->name);
    if (options.depth < 1 || options.depth > DEPTH_MAX || options.names > NAMES_MAX || options.connections < 1 ||
        options.names % options.connections || options.names / options.connections < options.depth)
        die("each connection needs as many names as the others, and as many as are asked for at a time");
}

int main(int count_of, char **words) {
    struct shares from, to;
    read_options(count_of, words);
    shuffle();
    epoll = epoll_create1(0);
    connections = calloc(options.connections, sizeof *connections);
    for (uint32_t n = 0; n < options.connections; n++) {
        connections[n] = (struct connection){.number = n, .last_turn = options.names / options.connections};
        open_connection(&connections[n]);
    }
    run(&from, &to);
    if (options.verify && options.work == WRITE)
        verify();
    double took_s = (double)(to.at_ns - from.at_ns) / 1e9;
    printf("{\"replies\": %llu, \"a_second\": %.1f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"load_share\": %.3f, "
           "\"server_share\": %.3f, \"lost\": %llu}\n",
        (unsigned long long)replies, (double)replies / (options.once ? took_s : options.seconds),
        histogram_us(&histogram, 0.5), histogram_us(&histogram, 0.99), (to.own_s - from.own_s) / took_s,
        (to.server_s - from.server_s) / took_s, (unsigned long long)lost);
    fflush(stdout);
    if (options.hold)
        while (getchar() != EOF)
            ;
    leave();
    return 0;
}
