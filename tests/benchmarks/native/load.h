/* What the parts of the load generator share: cards (messages with holes), connections, and what a protocol is.
 *
 * Every service has a name of six digits' width, a port of five and a value of one width, all functions of its
 * number. So every request has one length, is a copy of a card with some digits written in, and the right reply to it
 * is known byte by byte.
 */
#ifndef LOAD_H
#define LOAD_H

#include <stddef.h>
#include <stdint.h>

#define CARD_BYTES 2048
#define HOLES 8
#define SLOTS 256 /* a power of two, and more than the deepest pipeline */
#define DEPTH_MAX 64
#define INPUT_BYTES 65536
#define HELD_BYTES 1024
#define NAMES_MAX 1000000

/* What a value is in the peers: what regd keeps of a service and answers. %N, %P and %C are holes. */
#define INSTANCE                                                                                                      \
    "\"name\":\"svc-%N\",\"instance\":\"\",\"host\":\"127.0.0.1\",\"port\":%P,\"meta\":{\"n\":\"%C\"},"              \
    "\"state\":\"ready\""
#define VALUE "{" INSTANCE "}"

enum work { READ, WRITE, CREATE, PING_WORK, WORKS };

/* One request: which service, the how-manieth change, and what tells its reply from others. */
struct asked {
    uint32_t key, count, tag, connection;
};

struct hole {
    char kind;
    size_t at;
};

/* A message with holes. In the text that makes it:
 * %N six digits of the name   %P five digits of the port   %C ten digits of the change   %% a percent sign
 * %T three digits of the slot %I four digits of the connection
 * %X the tag in four bytes    %S the HTTP/2 stream in four bytes    %Q the port in two bytes
 */
struct card {
    char bytes[CARD_BYTES];
    size_t length;
    struct hole holes[HOLES];
    int hole_count;
    int open_end; /* as a reply: more may follow, which nobody can know beforehand */
};

void card_text(struct card *card, const char *text);
void card_add(struct card *card, const char *text, size_t length); /* the same, of a text that has zeros in it */
void card_bytes(struct card *card, const char *bytes, size_t length); /* as they are, without holes */
void card_print(struct card *card, const char *format, ...) __attribute__((format(printf, 2, 3))); /* likewise */
void card_number(struct card *card, uint32_t number, int bytes); /* big end first */
size_t card_fill(const struct card *card, const struct asked *asked, char *out);
int card_matches(const struct card *card, const struct asked *asked, const char *bytes, size_t length);
uint32_t port_of(uint32_t key);
struct card value_card(void);

struct slot {
    struct asked asked;
    enum work work;
    int busy;
    uint64_t sent_ns;
    char held[HELD_BYTES]; /* the parts of a reply that comes in several frames */
    size_t held_length;
};

struct connection {
    int fd;
    uint32_t number;
    int greeted;
    uint32_t asked, answered; /* requests sent and replies taken, in all: the tags of protocols that keep order */
    int outstanding;
    uint32_t turn;      /* how many names it has asked for */
    uint32_t last_turn; /* where each name is asked for once: after how many there is none left */
    uint64_t taken_bytes; /* of the HTTP/2 window */
    struct slot *slots;
    char *input;
    size_t input_length;
};

enum kind { CONTROL, GREETED, ANSWER };

struct answer {
    enum kind kind;
    uint32_t slot;
    const char *payload;
    size_t length;
};

/* How one server is talked to. */
struct protocol {
    const char *name;
    struct card greeting; /* empty: none, and none is waited for */
    struct card farewell; /* empty: the connection is closed */
    struct card request[WORKS];
    struct card reply[WORKS];
    struct card watch; /* what a watcher sends to hear of the change `publish` */
    struct card publish;
    int may_lose; /* it promises a reply at most once: one that never comes is counted, and the others go on */
    int single;   /* a READ has a connection of its own, which the server ends */
    /* Take one message off the front: return its length, 0 when it is not all there. */
    size_t (*take)(struct connection *, const char *bytes, size_t length, struct answer *);
};

void make_regd(struct protocol *);
void make_floor(struct protocol *);
void make_redis(struct protocol *);
void make_memcached(struct protocol *);
void make_nats(struct protocol *);
void make_zookeeper(struct protocol *);
void make_etcd(struct protocol *);
void make_epmd(struct protocol *);
struct protocol *protocol_named(const char *name);

_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say(struct connection *connection, const char *bytes, size_t length);
void dial(struct connection *connection, const struct protocol *protocol, int port);
uint64_t now_ns(void);
uint32_t number_at(const char *bytes); /* of four bytes, big end first */
size_t line_length(const char *bytes, size_t length); /* with its \n; 0 when it has none yet */

/* Latencies: 64 buckets to an octave, so a percentile is right to within 1.6 %. */
struct histogram {
    uint64_t buckets[64 * 64];
    uint64_t count;
};

void histogram_add(struct histogram *histogram, uint64_t ns);
double histogram_us(const struct histogram *histogram, double part);

#endif
